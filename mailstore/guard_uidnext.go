//go:build !mutant_uidnext

package mailstore

// uidsKept says that the next UID of a folder is known after a crash. The tag
// mutant_uidnext takes the guard out, and the tests must notice.
const uidsKept = true
