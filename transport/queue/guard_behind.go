//go:build !mutant_behind

package queue

// behindIsDeferred says that mail which a home did not try, as earlier mail of its sender waits, is put off like mail that the home itself could
// not take. The tag mutant_behind sets it, and the tests must notice.
const behindIsDeferred = false
