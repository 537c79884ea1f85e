//go:build !mutant_detour

package link

// goesAround says that streams go through a third node where the line to a peer
// is cut. The tag mutant_detour takes the guard out, and the tests must notice.
const goesAround = true
