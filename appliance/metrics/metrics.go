// Package metrics shows a node's figures to Prometheus. It measures nothing by
// itself: each figure is read from the status when it is asked for.
package metrics

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"posthouse/appliance/admin"
	"posthouse/mesh"
)

// Figure is a number that an engine counts, without labels.
type Figure struct {
	Name  string // without "posthouse_"; a counter's ends in "_total"
	Help  string
	Gauge bool // it goes down too
	Value float64
}

// New returns the metrics of a node; status and figures are asked at each
// scrape. figures returns the same names at each call.
func New(status func(context.Context) (admin.Status, error), figures func() []Figure) prometheus.Gatherer {
	r := prometheus.NewRegistry()
	r.MustRegister(counted(figures))
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	r.MustRegister(&collector{status: status,
		waiting: prometheus.NewDesc("posthouse_queue_recipients", "Recipients that wait on this node, by destination.", []string{"destination"}, nil),
		up:      prometheus.NewDesc("posthouse_member_up", "Whether a node of the mesh can be reached from here.", []string{"member"}, nil),
		rtt:     prometheus.NewDesc("posthouse_member_rtt_seconds", "Smoothed round-trip time to a node.", []string{"member"}, nil),
		term:    prometheus.NewDesc("posthouse_term", "Term of the election.", nil, nil),
		master:  prometheus.NewDesc("posthouse_master", "Whether this node is the master.", nil, nil),
		ok:      prometheus.NewDesc("posthouse_healthy", "Whether the sentence of health is a good one.", nil, nil),
	})
	return r
}

// counted shows the engines' figures. It describes nothing: a figure may be
// missing while the store is not open yet.
type counted func() []Figure

func (counted) Describe(chan<- *prometheus.Desc) {}

func (f counted) Collect(ch chan<- prometheus.Metric) {
	for _, x := range f() {
		kind := prometheus.CounterValue
		if x.Gauge {
			kind = prometheus.GaugeValue
		}
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("posthouse_"+x.Name, x.Help, nil, nil), kind, x.Value)
	}
}

type collector struct {
	status                             func(context.Context) (admin.Status, error)
	waiting, up, rtt, term, master, ok *prometheus.Desc
}

func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.waiting, c.up, c.rtt, c.term, c.master, c.ok} {
		ch <- d
	}
}

func (c *collector) Collect(ch chan<- prometheus.Metric) {
	s, err := c.status(context.Background())
	if err != nil {
		return
	}
	num := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, m := range s.Members {
		gauge(c.waiting, float64(m.Queue), m.Name)
		gauge(c.up, num(m.State == string(mesh.Serving)), m.Name)
		gauge(c.rtt, m.RTT/1000, m.Name)
	}
	gauge(c.waiting, float64(s.QueueOutside), "outside")
	gauge(c.term, float64(s.Term))
	gauge(c.master, num(s.Master == s.Node && s.Master != ""))
	gauge(c.ok, num(s.Health.OK))
}
