//go:build !mutant_lost_report

package queue

// holdsReports says that a report that cannot be delivered waits for a person.
// The tag mutant_lost_report takes the guard out, and the tests must notice.
const holdsReports = true
