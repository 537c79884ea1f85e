//go:build mutant_depth

package mime

const boundsDepth = false
