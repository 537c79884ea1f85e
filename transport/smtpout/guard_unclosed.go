//go:build !mutant_unclosed

package smtpout

// connectionsEnd says that a connection to another host is closed when it has
// done its work. The tag mutant_unclosed takes the guard out, and the tests
// must notice.
const connectionsEnd = true
