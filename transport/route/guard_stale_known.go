//go:build !mutant_stale_known

package route

// knownAreTaken says that a recipient who is known is taken, however old the
// copy of the domain state. The tag mutant_stale_known takes the guard out, and
// the tests must notice.
const knownAreTaken = true
