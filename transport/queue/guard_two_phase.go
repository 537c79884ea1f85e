//go:build !mutant_two_phase

package queue

// waitsForRelease says that a gateway tries nothing that its origin has not
// released. The tag mutant_two_phase takes the guard out, and the tests must
// notice.
const waitsForRelease = true
