//go:build !mutant_answer_uncertain

package smtpd

// silentWhenUncertain: nobody is told yes or no when neither is known.
// Build tag mutant_answer_uncertain turns it off, to prove that the tests notice.
const silentWhenUncertain = true
