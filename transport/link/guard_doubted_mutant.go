//go:build mutant_doubted

package link

const leavesDoubted = false
