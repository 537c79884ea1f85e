//go:build !mutant_delay_twice

package queue

// delayToldOnce says that the next node knows of a delay that was told. The tag
// mutant_delay_twice takes the guard out, and the tests must notice.
const delayToldOnce = true
