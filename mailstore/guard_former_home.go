//go:build !mutant_former_home

package mailstore

// homeOnly says that a mailbox that lives elsewhere takes no mail here. The tag
// mutant_former_home takes the guard out, and the tests must notice.
const homeOnly = true
