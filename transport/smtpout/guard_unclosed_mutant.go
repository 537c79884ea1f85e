//go:build mutant_unclosed

package smtpout

const connectionsEnd = false
