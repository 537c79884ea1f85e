//go:build !mutant_token_reuse

package domain

// tokensOnce says that a join token admits one node. The tag mutant_token_reuse takes the
// guard out, and the tests must notice.
const tokensOnce = true
