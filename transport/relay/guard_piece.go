//go:build !mutant_piece

package relay

// piece is how many bytes are progress: a line, or our share of one, of 13 kbit/s
// is alive. The tag mutant_piece makes it what goes in one frame, and the tests
// must notice.
const piece = 8 << 10
