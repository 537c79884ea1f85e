//go:build !mutant_busy

package queue

// busyHolds says that mail waits behind earlier mail of its sender to the same
// mailbox that cannot go now because other recipients of it, or a record about
// it, are under way. The tag mutant_busy takes the guard out, and the tests
// must notice.
const busyHolds = true
