//go:build mutant_modseq

package mailstore

const modsKept = false
