//go:build mutant_truncated

package smtpd

const wholeTextsOnly = false
