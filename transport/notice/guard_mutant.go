//go:build mutant_any_word

package notice

const ownWordOnly = false
