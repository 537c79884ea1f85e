//go:build !mutant_read

package relay

// untilRead says that mail behind what was deferred waits until its sender had
// read of that. The tag mutant_read takes the guard out, and the tests must notice.
const untilRead = true
