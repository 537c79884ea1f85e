//go:build !mutant_seen

package queue

// seenSoon says that a node which is seen alive is tried again within seconds. The tag mutant_seen takes the
// guard out, and the tests must notice.
const seenSoon = true
