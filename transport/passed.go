package transport

// Passed is a message that this node has accepted, as its archive hears of it.
type Passed struct {
	Envelope   Envelope // as it is kept
	Recipients []string // addresses as the client gave them, in its order
	Size       int64    // bytes of the text as it is kept, with this node's own lines
	// Queue is the message's number in the queue: the log has the text under it.
	Queue string
}
