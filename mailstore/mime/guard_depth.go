//go:build !mutant_depth

package mime

// boundsDepth says that a message nests only so deep. The tag mutant_depth takes the
// guard out, and the tests must notice.
const boundsDepth = true
