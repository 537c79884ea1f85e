//go:build !mutant_unrotated

package domain

// rotating says that the candidates' key is replaced when a node that holds it is
// no candidate any more. The tag mutant_unrotated takes the guard out, and the
// tests must notice.
const rotating = true
