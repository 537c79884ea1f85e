//go:build !mutant_lineage

package election

// followsPromoted says that a node follows a lineage that descends from its
// own. The tag mutant_lineage takes the guard out, and the tests must notice.
const followsPromoted = true
