//go:build !mutant_joiner

package appliance

// joinersWait says that a node that knows no office yet takes no mail. The tag
// mutant_joiner takes the guard out, and the tests must notice.
const joinersWait = true
