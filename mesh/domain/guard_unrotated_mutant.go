//go:build mutant_unrotated

package domain

const rotating = false
