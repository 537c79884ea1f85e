//go:build !mutant_lane

package queue

// lanesWait says that mail waits behind earlier mail of its sender to the same
// mailbox that was deferred. The tag mutant_lane takes the guard out, and the
// tests must notice.
const lanesWait = true
