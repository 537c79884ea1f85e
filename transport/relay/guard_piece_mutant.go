//go:build mutant_piece

package relay

const piece = maxData
