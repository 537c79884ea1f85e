//go:build mutant_old_vote

package election

const givesUpItsVote = false
