//go:build !mutant_resumption

package identity

// nothingResumed says that every connection proves its key anew. The tag
// mutant_resumption takes the guard out, and the tests must notice.
const nothingResumed = true
