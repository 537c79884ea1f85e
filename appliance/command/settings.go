package command

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"posthouse/appliance/admin"
)

// size is a number of bytes as people write it: 500, 64K, 72M, 2G (powers of
// 1,024).
type size int64

func (s *size) String() string { return strconv.FormatInt(int64(*s), 10) }
func (s *size) Type() string   { return "size" }
func (s *size) Set(v string) error {
	unit := int64(1)
	v = strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(v), "B"), "I")
	if i := strings.IndexAny(v, "KMG"); i >= 0 && i == len(v)-1 {
		unit = 1 << (10 * (1 + strings.IndexByte("KMG", v[i])))
		v = v[:i]
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < 0 || n > 1<<50/unit {
		return fmt.Errorf("want a size such as 72M or 2G")
	}
	*s = size(n * unit)
	return nil
}

func (a *app) settings() *cobra.Command {
	var (
		largest, quota                    size
		smarthost, clientName, postmaster string
	)
	c := a.listing(&cobra.Command{Use: "settings", Short: "Values of the whole mesh: show them, or change those given",
		Example: "  posthouse mesh settings\n  posthouse mesh settings --smarthost relay.provider.net:587 --max-message 50M",
		Args:    usage(cobra.NoArgs), RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
			var r admin.SettingsChange
			given := false
			pick := func(flag string, set func()) {
				if c.Flags().Changed(flag) {
					given = true
					set()
				}
			}
			pick("max-message", func() { r.MaxMessage = (*int64)(&largest) })
			pick("quota", func() { r.Quota = (*int64)(&quota) })
			pick("smarthost", func() { r.Smarthost = &smarthost })
			pick("client-name", func() { r.ClientName = &clientName })
			pick("postmaster", func() { r.Postmaster = &postmaster })
			s, err := n.Settings(c.Context())
			if given {
				s, err = n.ChangeSettings(c.Context(), r)
			}
			if err != nil {
				return err
			}
			return a.print(s, "SETTING VALUE", func(add func(...any)) {
				add("max-message", s.MaxMessage)
				add("quota", s.Quota)
				add("smarthost", dash(s.Smarthost))
				add("client-name", dash(s.ClientName))
				add("postmaster", dash(s.Postmaster))
			})
		})})
	c.Flags().Var(&largest, "max-message", "largest message, such as 72M")
	c.Flags().Var(&quota, "quota", "largest mailbox, such as 10G; 0 for none")
	c.Flags().StringVar(&smarthost, "smarthost", "", "host or host:port that takes all mail for outside; \"\" sends directly")
	c.Flags().StringVar(&clientName, "client-name", "", "the one host name that clients are told")
	c.Flags().StringVar(&postmaster, "postmaster", "", "user or group who gets mail to postmaster@ and abuse@")
	return c
}
