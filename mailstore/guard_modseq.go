//go:build !mutant_modseq

package mailstore

// modsKept says that the next modification sequence of a folder is known after
// a crash. The tag mutant_modseq takes the guard out, and the tests must
// notice.
const modsKept = true
