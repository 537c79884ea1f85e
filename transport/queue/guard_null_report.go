//go:build !mutant_null_report

package queue

// noReportToNobody says that a message without a sender makes no report. The
// tag mutant_null_report takes the guard out, and the tests must notice.
const noReportToNobody = true
