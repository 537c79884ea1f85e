//go:build !mutant_expunge

package imapd

// expungesLater says that a client hears of an expunge only where its numbers
// may change. The tag mutant_expunge takes the guard out, and the tests must
// notice.
const expungesLater = true
