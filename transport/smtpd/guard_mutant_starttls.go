//go:build mutant_starttls

package smtpd

const (
	guardLineEnds = true
	guardSTARTTLS = false
)
