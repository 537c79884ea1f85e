//go:build mutant_uidnext

package mailstore

const uidsKept = false
