//go:build !mutant_smuggling && !mutant_starttls

package smtpd

// The guards can be taken out by a build tag, so that a run of the tests shows
// that they would notice (each such run must fail):
//
//	go test -tags mutant_smuggling ./transport/smtpd
//	go test -tags mutant_starttls ./transport/smtpd
const (
	guardLineEnds = true // a bare CR or LF refuses a text
	guardSTARTTLS = true // nothing sent in the clear is read after STARTTLS
)
