//go:build !mutant_busy

package queue

// busyHolds says that mail waits behind earlier mail of its sender to the same mailbox about which a record is under way, a deferral or a
// delay that was told. The tag mutant_busy takes the guard out, and the tests must notice.
const busyHolds = true
