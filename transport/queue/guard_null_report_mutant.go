//go:build mutant_null_report

package queue

const noReportToNobody = false
