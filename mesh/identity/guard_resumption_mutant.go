//go:build mutant_resumption

package identity

const nothingResumed = false
