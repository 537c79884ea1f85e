//go:build !mutant_final

package queue

// givenUpIsFinal says that what is given up on a deferral ends as failed. The
// tag mutant_final takes the guard out, and the tests must notice.
const givenUpIsFinal = true
