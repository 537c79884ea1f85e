//go:build !mutant_outside_full

package smtpout

// waitsForRoom: nothing is sent while the answer could not be recorded. A build tag
// takes it away, for the test that must notice.
const waitsForRoom = true
