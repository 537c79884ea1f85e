//go:build mutant_lineage

package election

const followsPromoted = false
