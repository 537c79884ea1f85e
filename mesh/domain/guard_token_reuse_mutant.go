//go:build mutant_token_reuse

package domain

const tokensOnce = false
