//go:build !mutant_sync_error

package log

// minded says that a failed sync is minded. The tag mutant_sync_error takes the
// guard out, and the tests must notice.
const minded = true
