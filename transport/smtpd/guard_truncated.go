//go:build !mutant_truncated

package smtpd

// wholeTextsOnly says that a text whose end was not read is none. The tag
// mutant_truncated takes the guard out, and the tests must notice.
const wholeTextsOnly = true
