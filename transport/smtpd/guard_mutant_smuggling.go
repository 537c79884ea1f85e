//go:build mutant_smuggling

package smtpd

const (
	guardLineEnds = false
	guardSTARTTLS = true
)
