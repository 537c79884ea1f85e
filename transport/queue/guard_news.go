//go:build !mutant_no_wake

package queue

// newsWakes says that what is heard of a destination wakes its queue, whatever
// its schedule said. The tag mutant_no_wake takes the guard out, and the tests
// must notice.
const newsWakes = true
