//go:build mutant_smuggling

package smtpout

const guardLineEnds = false
