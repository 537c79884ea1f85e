//go:build !mutant_old_vote

package election

// givesUpItsVote says that a node whose disk is an older one gives up the only
// vote where another node leads. The tag mutant_old_vote takes the guard out,
// and the tests must notice.
const givesUpItsVote = true
