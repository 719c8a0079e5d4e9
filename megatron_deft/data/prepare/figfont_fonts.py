"""The fonts that FigFont draws from, in the order that its random numbers index.

reasoning-gym takes them in the order in which the file system happens to list pyfiglet's folder,
which differs from machine to machine. Kept here, the same seed gives the same set everywhere.
These are the 447 fonts of pyfiglet 1.0.2 that reasoning-gym 0.1.25 does not leave out.
"""

_NAMES = """
tty banner3 sbook clb8x8 char1___ utopia calgphy2 wavy sbooki xsbookbi 4x4_offr future_3 future_5
fp1_____ this jazmine caus_in_ fp2_____ yie-ar__ 1943____ stop future_4 rockbox_ future_7 filter
isometric2 xsansi avatar threepoint cricket slscript chunky big_money-sw tec1____ chiseled smshadow
impossible delta_corps_priest_1 char3___ xsansbi outrun__ ascii___ xsansb double swan muzzle
charact6 devilish small_slant gothic aquaplan larry3d ascii_new_roman spc_demo sblood isometric3
future_6 coil_cop xhelvbi line_blocks taxi____ ti_pan__ braced charact2 js_bracket_letters eca_____
beer_pub ticks rastan__ xtimes clr6x10 stencil2 o8 street_s runic c2______ contessa new_asci
coinstak 4max green_be starwars fbr_stri banner4 fire_font-s xcourb xcourbi amc_razor2 amc_neko
xsbook cursive britei linux f15_____ sbookbi slide rozzo utopiai kban train nancyj-improved
lockergnome weird cybermedium amc_aaa01 cli8x8 spliff tubular type_set house_of calvin_s xchartr
twin_cob xchartri helv usaflag clr8x8 roman___ demo_2__ bubble raw_recu zone7___ amc_thin skateord
64f1____ z-pilot_ utopiab fireing_ dotmatrix ok_beer_ lean fbr_tilt helvb radical_ ugalympi
mayhem_d rounded broadway big_money-ne diamond colossal advenger sansb helvi slant straight
war_of_w xttyb fbr12___ lcd roman stronger_than_all bulbhead bell clr5x8 platoon2 clr8x10 merlin1
lil_devil asc_____ italic bolger xsbooki nvscript triad_st zig_zag_ ticksslant peaks 5x8 italics_
knob clr5x10 tsm_____ sansbi inc_raw_ trek stealth_ alligator2 mig_ally a_zooloo cosmic clb8x10
block r2-d2___ acrobatic madrid sketch_s js_stick_letters merlin2 univers diet_cola alligator
npn_____ bright stampatello twisted rowancap pawp xhelvb sweet road_rai xhelv xcouri charact5
yie_ar_k amc_tubes char2___ fender 5lineoblique banner3-D ebbs_2__ def_leppard xhelvi big_money-se
clb6x10 5x7 nancyj smisome1 georgi16 catwalk old_banner small_shadow hollywood rci_____ fire_font-k
arrows sansi t__of_ap santa_clara clr4x6 pebbles xcour 3-d stforek pod_____ fourtops banner
rectangles home_pak patorjk's_cheese xbritebi 3d-ascii charact3 bubble__ fuzzy com_sen_ blocky
fair_mea eftifont defleppard mcg_____ nancyj-underlined alphabet unarmed_ 3x5 nancyj-fancy ripper!_
future_1 c1______ shimrod eftirobot utopiabi space_op top_duck modular isometric4 rev c_ascii_
bigchief alpha thin ghoulish poison red_phoenix hades___ isometric1 serifcap tinker-toy sbookb
ansi_regular demo_1__ soft charact1 puffy finalass fantasy_ bloody cour couri dancing_font blocks
cyberlarge dos_rebel slant_relief mini glenyn phonix__ helvbi test1 d_dragon chartr double_shorts
small_caps swamp_land xbriteb modern__ brite marquee magic_ma nipples speed xtty platoon_ 6x9
hyper___ amc_slash sl_script tiles gradient ucf_fan_ funky_dr vortron_ master_o big georgia11
letterw3 xbritei tombstone sm______ courbi druid___ charact4 3d_diagonal bubble_b usa_____ script
usa_pq__ caligraphy eftiwater sub-zero rad_____ chartri star_strips ansi_shadow pawn_ins krak_out
small amc_untitled tav1____ smslant epic twopoint crawford2 skateroc rok_____ fbr1____ ghost_bo
barbwire sans star_war letters xsbookb small_poison basic amc_razor shadow char4___ 1row drpepper
crazy stampate os2 demo_m__ cygnet doh graffiti britebi whimsy smscript thick heavy_me super_te
tec_7000 gothic__ xsans jacky cosmike future_2 varsity clr6x8 wet_letter ts1_____ briteb relief
bigfig lexible_ tanja pepper big_money-nw short times contrast stick_letters flower_power
broadway_kb xbrite rad_phan fun_faces doom ebbs_1__ 6x10 thorned digital b_m__200 script__ skate_ro
henry_3d stellar nscript the_edge fraktur fairligh computer invita elite standard js_block_letters
crawford lazy_jon clr5x6 js_capital_curves fbr2____ ogre electronic clr6x6 maxfour amc_slider
asslt__m amc_3_line clr7x10 stacey graceful characte eftitalic clr7x8 ttyb benjamin
"""
FONTS = tuple(_NAMES.split())
