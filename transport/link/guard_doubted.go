//go:build !mutant_doubted

package link

// leavesDoubted says that a bulk connection in which nothing goes on takes no new streams. The tag mutant_doubted takes the
// guard out, and the tests must notice.
const leavesDoubted = true
