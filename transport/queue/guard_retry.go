//go:build !mutant_retry

package queue

// deferredWaits says that a deferred recipient is tried again. The tag mutant_retry takes the
// guard out, and the tests must notice.
const deferredWaits = true
