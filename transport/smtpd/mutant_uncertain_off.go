//go:build mutant_answer_uncertain

package smtpd

const silentWhenUncertain = false
